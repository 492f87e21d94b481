"""What engines can serve, as data: each row with where it was read.

Rows are keyed by what config.json's quantization_config says of a weight, whoever wrote it. They were read in the
released sources of the versions in VERSIONS (`S` is vLLM's folder layers/quantization/compressed_tensors/schemes); what
was run and not read says so. SM are NVIDIA's compute capabilities, 90 for sm_90; N are the outputs and K the inputs of
a linear, on one rank.
"""

from dataclasses import dataclass

VERSIONS = {"vllm": "0.32.0", "sglang": "0.5.23", "transformers": "5.23 (compressed-tensors 0.20)"}
"""The versions that the rows are of."""
CHANNEL = -1
"""Stands among group sizes for one scale per output channel."""
CPU = "cpu"


@dataclass(frozen=True)
class Form:
    """A way of storing weights that engines have a name for. None fits everything."""

    name: str
    methods: tuple[str, ...] = ("compressed-tensors",)
    bits: tuple[int, ...] | None = None
    type: str | None = None
    strategies: tuple[str, ...] | None = None
    group_sizes: tuple[int, ...] | None = None
    inputs: tuple[str, int] | bool | None = None
    """Type and bits of quantized inputs; None for inputs that are not quantized, True for either."""
    instead: str = "another scheme, or fp16"
    """What to use where it does not run."""


FORMS = (
    Form("w8a8-int8", bits=(8,), type="int", strategies=("channel", "tensor"), inputs=("int", 8),
         instead="fp8-dynamic (sm_89 and newer), w8a16 or fp16"),
    Form("wNa8-int8", bits=(2, 3, 4, 5, 6, 7, 8), type="int", strategies=("channel", "group"), inputs=("int", 8)),
    Form("w4afp8", bits=(4,), type="int", strategies=("group",), inputs=("float", 8),
         instead="w4a16"),
    Form("wNa16", bits=(2, 3, 4, 5, 6, 7, 8), type="int", strategies=("channel", "group"),
         instead="w4a16 with groups of 128, w8a16 or fp16"),
    Form("fp8-block", ("compressed-tensors", "fp8"), (8,), "float", ("block",), inputs=("float", 8),
         instead="fp8-dynamic, or fp16 where K does not divide"),
    Form("fp8", ("compressed-tensors", "fp8", "modelopt"), (8,), "float", ("channel", "tensor"), inputs=("float", 8),
         instead="w8a16 or w8a8-dynamic"),
    Form("fp8a16", bits=(8,), type="float", strategies=("channel", "tensor", "block")),
    Form("nvfp4", ("compressed-tensors", "modelopt"), (4,), "float", ("tensor_group",), (16,), inputs=("float", 4),
         instead="w4a16"),
    Form("nvfp4a16", bits=(4,), type="float", strategies=("tensor_group",), group_sizes=(16,),
         instead="w4a16"),
    Form("mxfp4", bits=(4,), type="float", strategies=("group",), group_sizes=(32,), inputs=("float", 4)),
    Form("mxfp4a16", bits=(4,), type="float", strategies=("group",), group_sizes=(32,),
         instead="nvfp4a16 or w4a16"),
    Form("mxfp8", bits=(8,), type="float", strategies=("group",), group_sizes=(32,), inputs=True),
    Form("gptq", methods=("gptq",), inputs=True),
    Form("awq", methods=("awq",), inputs=True),
    Form("bitsandbytes", methods=("bitsandbytes",), inputs=True),
)  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """A kernel of an engine, and what it takes. A weight is served if one of its form's rows takes it."""

    engine: str
    form: str
    kernel: str
    source: str
    device: str = "gpu"
    least_sm: int = 0
    most_sm: int | None = None
    bits: tuple[int, ...] | None = None
    groups: tuple[int, ...] | None = None
    symmetric: bool | None = None
    n: int = 1
    """N is a multiple of it, over all linears that run as one."""
    k: int = 1
    n_each: int = 1
    """N of each of the linears that run as one, but the last where nothing is split, is a multiple of it."""
    formats: tuple[str, ...] | None = None
    """What the config calls the way the tensors are stored."""
    dtypes: tuple[str, ...] | None = None
    """Of the model."""
    experts: bool | None = None
    """True for routed experts only, False for all but them."""
    note: str = ""
    """What is worth knowing where this is the kernel that runs."""
    change: str = "nothing"
    """What to do about it."""


WNA16 = "vllm S/compressed_tensors_wNa16.py: "
MP = "vllm kernels/linear/mixed_precision/"
PACKED = ("pack-quantized",)
SGL = "sglang layers/quantization/compressed_tensors/schemes/"
MARLIN_GROUPS = (CHANNEL, 32, 64, 128)
HUMMING = "only Humming takes it, which needs the package humming-kernels beside vLLM"
WEIGHT_ONLY = "inputs stay 16 bit: the kernel is weight-only there"
SLOW_FP8 = "torch's FP8 product is a plain loop on CPUs without AMX-FP8: minutes a token for a model of 100 M"
W4A8 = "inputs are rounded to 8 bits on CPUs with AMX"
NO_W4A8 = "set VLLM_CPU_INT4_W4A8=0 for the server"

KERNELS = (
    # vLLM, integers
    Kernel("vllm", "wNa16", "Machete", MP + "machete.py; utils/machete_utils.py", least_sm=90, most_sm=90,
           bits=(4, 8), groups=(CHANNEL, 64, 128), n=128, k=64, formats=PACKED),
    Kernel("vllm", "wNa16", "Marlin", MP + "marlin.py (N and K are padded to its tiles)", least_sm=75, bits=(4, 8),
           groups=MARLIN_GROUPS, symmetric=True, formats=PACKED),
    Kernel("vllm", "wNa16", "Marlin", MP + "marlin.py; marlin_utils.py: zero points at 4 bits", least_sm=75, bits=(4,),
           groups=MARLIN_GROUPS, symmetric=False, formats=PACKED),
    Kernel("vllm", "wNa16", "Humming", WNA16 + "2 to 8 bits; " + MP + "humming.py", least_sm=75, formats=PACKED,
           note=HUMMING),
    Kernel("vllm", "wNa16", "CPUWNA16", MP + "cpu.py", device=CPU, bits=(4,), n=32, k=32, formats=PACKED,
           note=W4A8, change=NO_W4A8),
    Kernel("vllm", "w8a8-int8", "CUTLASS or Triton",
           "vllm S/compressed_tensors_w8a8_int8.py: 75; csrc/.../scaled_mm_c3x_sm100.cu and _sm120.cu: no int8, found "
           "out at the first forward pass; kernels/linear/scaled_mm/cutlass.py: inputs dynamic or static", least_sm=75,
           most_sm=99),
    Kernel("vllm", "w8a8-int8", "CPUInt8ScaledMM", "vllm kernels/linear/scaled_mm/cpu.py", device=CPU),
    Kernel("vllm", "wNa8-int8", "Humming", "vllm S/compressed_tensors_wNa8.py", least_sm=75, note=HUMMING),
    Kernel("vllm", "w4afp8", "CUTLASS W4A8", "vllm S/compressed_tensors_w4a8_fp8.py; " + MP + "cutlass.py", least_sm=90,
           most_sm=90, bits=(4,), groups=(128,), symmetric=True, n=128, k=128, formats=PACKED, dtypes=("bfloat16",)),
    # vLLM, floats
    Kernel("vllm", "fp8", "CUTLASS FP8",
           "vllm S/compressed_tensors_w8a8_fp8.py: 89; compressed_tensors.py: _is_fp8_w8a8 (inputs dynamic, or static "
           "with one scale)", least_sm=89),
    Kernel("vllm", "fp8", "Marlin W8A16", "vllm S/compressed_tensors_w8a16_fp8.py: 75", least_sm=75, note=WEIGHT_ONLY),
    Kernel("vllm", "fp8", "torch", "vllm kernels/linear/__init__.py: _POSSIBLE_FP8_KERNELS; run", device=CPU,
           note=SLOW_FP8, change="use w8a8-dynamic or w4a16 on a CPU"),
    Kernel("vllm", "fp8-block", "FP8 blocks",
           "vllm utils/fp8_utils.py: validate_fp8_block_shape, per_token_group_quant_fp8", least_sm=89, k=128,
           n_each=128),
    Kernel("vllm", "fp8-block", "Marlin W8A16", "vllm S/compressed_tensors_w8a16_fp8.py: 75; validate_fp8_block_shape",
           least_sm=75, k=128, n_each=128, note=WEIGHT_ONLY),
    Kernel("vllm", "fp8-block", "CPU FP8 blocks", "vllm kernels/linear/__init__.py: _POSSIBLE_FP8_BLOCK_KERNELS",
           device=CPU, k=128, n_each=128, note=WEIGHT_ONLY),
    Kernel("vllm", "fp8a16", "Marlin W8A16", "vllm S/compressed_tensors_w8a16_fp8.py: 75", least_sm=75),
    Kernel("vllm", "nvfp4", "FlashInfer or CUTLASS", "vllm kernels/linear/nvfp4/: native on Blackwell", least_sm=100,
           k=16),
    Kernel("vllm", "nvfp4", "Marlin", "vllm S/compressed_tensors_w4a4_nvfp4.py: 75; kernels/linear/nvfp4/marlin.py",
           least_sm=75, k=16, note=WEIGHT_ONLY),
    Kernel("vllm", "nvfp4a16", "Marlin", "vllm S/compressed_tensors_w4a4_nvfp4.py: 75 (use_a16)", least_sm=75, k=16),
    Kernel("vllm", "mxfp4", "FlashInfer or Marlin", "vllm S/compressed_tensors_w4a4_mxfp4.py: 80", least_sm=80, k=32),
    Kernel("vllm", "mxfp4a16", "Marlin", "vllm S/compressed_tensors_w4a4_mxfp4.py: 80", least_sm=80, k=32),
    Kernel("vllm", "mxfp8", "FlashInfer or Marlin", "vllm S/compressed_tensors_w8a8_mxfp8.py: 75", least_sm=75, k=32),
    # vLLM, other methods
    Kernel("vllm", "gptq", "Marlin", "vllm auto_gptq.py: TYPE_MAP", least_sm=75, bits=(4, 8), groups=MARLIN_GROUPS,
           symmetric=True),
    Kernel("vllm", "gptq", "Humming", "vllm auto_gptq.py: TYPE_MAP; " + MP + "humming.py", least_sm=75, bits=(4, 8),
           symmetric=True, note=HUMMING),
    Kernel("vllm", "gptq", "CPUWNA16", "vllm auto_gptq.py; " + MP + "cpu.py", device=CPU, bits=(4,), symmetric=True,
           n=32, k=32, note=W4A8, change=NO_W4A8),
    Kernel("vllm", "awq", "Marlin", "vllm auto_awq.py", least_sm=75, bits=(4,), groups=MARLIN_GROUPS),
    Kernel("vllm", "awq", "CPUWNA16", "vllm auto_awq.py; " + MP + "cpu.py", device=CPU, bits=(4,), n=32, k=32,
           note=W4A8, change=NO_W4A8),
    # SGLang
    Kernel("sglang", "wNa16", "Marlin", SGL + "compressed_tensors_wNa16.py: 80; marlin_utils.py", least_sm=80,
           bits=(4, 8), groups=MARLIN_GROUPS, symmetric=True, n=64, k=128, formats=PACKED),
    Kernel("sglang", "wNa16", "Marlin", SGL + "compressed_tensors_wNa16.py: 80; marlin_utils.py", least_sm=80,
           bits=(4,), groups=MARLIN_GROUPS, symmetric=False, n=64, k=128, formats=PACKED),
    Kernel("sglang", "w8a8-int8", "int8_scaled_mm",
           SGL + "compressed_tensors_w8a8_int8.py: 80; sgl-kernel int8_gemm_kernel.cu: up to 90", least_sm=80,
           most_sm=90),
    Kernel("sglang", "w4afp8", "CUTLASS W4A8", SGL + "compressed_tensors_w4a8_fp8_moe.py: 90", least_sm=90,
           groups=(128,), k=128, experts=True),
    Kernel("sglang", "fp8", "FP8", SGL + "compressed_tensors_w8a8_fp8.py: 89", least_sm=89),
    Kernel("sglang", "fp8", "Marlin W8A16", SGL + "compressed_tensors_w8a16_fp8.py: 80", least_sm=80, note=WEIGHT_ONLY),
    Kernel("sglang", "fp8-block", "FP8 blocks", SGL + "compressed_tensors_w8a8_fp8.py: 89", least_sm=89, k=128,
           n_each=128),
    Kernel("sglang", "fp8a16", "Marlin W8A16", SGL + "compressed_tensors_w8a16_fp8.py: 80", least_sm=80),
    Kernel("sglang", "nvfp4", "FlashInfer", SGL + "compressed_tensors_w4a4_nvfp4.py: 100", least_sm=100, k=16),
    Kernel("sglang", "nvfp4", "Marlin", SGL + "compressed_tensors_w4a16_nvfp4.py: 80", least_sm=80, k=16,
           note=WEIGHT_ONLY),
    Kernel("sglang", "nvfp4a16", "Marlin", SGL + "compressed_tensors_w4a16_nvfp4.py: 80", least_sm=80, k=16),
    Kernel("sglang", "gptq", "Marlin", "sglang layers/quantization/gptq", least_sm=80, bits=(4, 8),
           groups=MARLIN_GROUPS, symmetric=True, n=64, k=128),
    Kernel("sglang", "awq", "Marlin", "sglang layers/quantization/awq", least_sm=80, bits=(4,), groups=MARLIN_GROUPS,
           n=64, k=128),
)  # fmt: skip
"""In the order in which an engine prefers them."""


@dataclass(frozen=True)
class Refusal:
    """What an engine does not load or run whatever the card. None fits everything."""

    engine: str
    rule: str
    why: str
    change: str
    source: str
    parts: tuple[str, ...] | None = None
    model_types: tuple[str, ...] | None = None
    forms: tuple[str, ...] | None = None
    but_forms: tuple[str, ...] = ()
    symmetric: bool | None = None
    bits: tuple[int, ...] | None = None
    act_order: bool | None = None
    dynamic: bool | None = None
    """False: where inputs have a scale that is stored."""
    tied: bool | None = None
    """True: where embedding and head are one weight."""
    device: str | None = None
    refused: bool = True
    """False for what works, though not as one may think."""


VISION, EMBEDDING, HEAD, LANGUAGE, EXPERTS = "vision_encoder", "embedding", "lm_head", "language", "experts"
KEEP_VISION = "give vision_encoder the scheme fp16 for this engine"
KEEP_EMBEDDING = "give embedding the scheme fp16 for this engine"
QWEN3_VL = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
NEEDS_US = "load it with vlmquant (import vlmquant before from_pretrained)"

REFUSALS = (
    Refusal("sglang", "component", "its Qwen3-VL vision encoder is built with quant_config=None and has no place for "
            "quantized weights", KEEP_VISION, "sglang models/qwen3_vl.py, line 1336", (VISION,), QWEN3_VL),
    Refusal("sglang", "embedding", "it has no quantized embedding", KEEP_EMBEDDING,
            "sglang compressed_tensors.py: get_quant_method; SGLang PR 36137 (open)", (EMBEDDING,)),
    Refusal("vllm", "embedding", "a quantized embedding that is the head as well is not served", KEEP_EMBEDDING,
            "vLLM 0.32, run (issue 44340)", (EMBEDDING, HEAD), tied=True),
    Refusal("vllm", "embedding", "an embedding is read in pack-quantized integers only", KEEP_EMBEDDING,
            "vllm compressed_tensors.py: get_quant_method", (EMBEDDING,), but_forms=("wNa16",)),
    Refusal("vllm", "embedding", "its embedding kernel knows no zero points, and only codes that do not span words",
            "use a symmetric scheme of 8 bits (w8) for the embedding, or fp16",
            "vllm compressed_tensors_embedding.py", (EMBEDDING,), forms=("wNa16",), symmetric=False),
    Refusal("vllm", "embedding", "its embedding kernel unpacks codes of 2, 4 or 8 bits only",
            "use 8 bits (w8) for the embedding, or fp16", "vllm compressed_tensors_embedding.py", (EMBEDDING,),
            forms=("wNa16",), bits=(3, 5, 6, 7)),
    Refusal("vllm", "embedding", "its embedding kernel is Triton's, which needs a GPU", KEEP_EMBEDDING,
            "vLLM 0.32 on CPU, run", (EMBEDDING,), device=CPU),
    Refusal("vllm", "component", "it has no loader for the quantized experts of this model type",
            "keep the experts at 16 bits (an override with modules: [\"*experts*\"])",
            "vllm models/aria.py, gpt_oss.py, molmo2.py", (EXPERTS,), ("aria", "gpt_oss", "molmo2")),
    Refusal("vllm", "component", "it wants this model's vision encoder at 16 bits", KEEP_VISION,
            "vllm models/kimi_k25.py", (VISION,), ("kimi_k25", "kimi_k2_5")),
    Refusal("vllm", "scheme", "it refuses GPTQ files with desc_act and groups", "export with static activation order "
            "(desc_act: false)", "vllm utils/gptq_utils.py", forms=("gptq",), act_order=True),
    Refusal("vllm", "scheme", "groups permuted by actorder (weight_g_idx) are not read any more",
            "quantize with static activation order", "vLLM 0.33; compressed-tensors 0.20", forms=("wNa16",),
            act_order=True),
    Refusal("vllm", "scheme", "bitsandbytes moved out of it into a plugin", "install the plugin vllm-bnb-plugin",
            "vllm layers/quantization (0.32 has no bitsandbytes.py)", forms=("bitsandbytes",)),
    Refusal("sglang", "scheme", "GPTQ files with desc_act and groups cannot be split and run slowly", "export with "
            "static activation order", "sglang layers/quantization/gptq", forms=("gptq",), act_order=True,
            refused=False),
    Refusal("sglang", "scheme", "int8 inputs are rounded by a scale for each token: the stored input_scale is loaded "
            "and not used", "quantize with w8a8-dynamic, and measure what is served", SGL +
            "compressed_tensors_w8a8_int8.py: apply_weights", forms=("w8a8-int8",), dynamic=False, refused=False),
    Refusal("vllm", "scheme", "on a CPU with AMX int8 inputs are rounded by a scale for each token: the stored "
            "input_scale is loaded and not used", "quantize with w8a8-dynamic, and measure what is served",
            "vllm kernels/linear/scaled_mm/cpu.py: _apply_weights_sgl", forms=("w8a8-int8",), dynamic=False,
            device=CPU, refused=False),
    Refusal("transformers", "component", "generate with an image calls a quantized vision encoder before it is "
            "dequantized and fails", NEEDS_US + ", or " + KEEP_VISION, "transformers 5.23, run", (VISION,),
            but_forms=("gptq", "awq", "bitsandbytes")),
    Refusal("transformers", "scheme", "packed weights with zero points do not load (their shapes differ)",
            NEEDS_US + ", or use a symmetric scheme", "transformers 5.23 with compressed-tensors 0.20, run; "
            "llm-compressor issues 1618, 1704", forms=("wNa16",), symmetric=False),
    Refusal("transformers", "embedding", "a quantized embedding does not load (Embedding has no weight)",
            NEEDS_US + ", or " + KEEP_EMBEDDING, "transformers 5.23, run", (EMBEDDING,), forms=("wNa16",)),
    Refusal("transformers", "scheme", "GPTQ and AWQ files need the package gptqmodel", "pip install gptqmodel optimum",
            "transformers 5.23, run", forms=("gptq", "awq"), refused=False),
)  # fmt: skip

COLUMN = frozenset(
    (
        *("q_proj", "k_proj", "v_proj", "qkv", "qkv_proj", "query", "key", "value", "q_b_proj", "kv_b_proj"),
        *("gate_proj", "up_proj", "gate_up_proj", "fc1", "linear_fc1", "linear_1", "w1", "w3", "c_fc"),
        *("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b"),
    )
)
"""Linears whose outputs tensor parallelism splits among the ranks, by the last part of their names."""
ROW = frozenset(("o_proj", "out_proj", "proj", "down_proj", "fc2", "linear_fc2", "linear_2", "w2", "c_proj", "dense"))
"""Linears whose inputs it splits."""
ENGINES_THAT_FUSE = ("vllm", "sglang")
"""They run q, k, v and gate, up as one linear and split linears among ranks."""


@dataclass(frozen=True)
class Prefixes:
    """How vLLM renames the modules of these model types, each rule in turn, as its WeightsMapper does."""

    model_types: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...]
    source: str


_TRANSFORMERS_5 = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
)
_HEAD = (("lm_head.", "language_model.lm_head."),)
VLLM_NAMES = (
    Prefixes(("llava", "llava_next", "gemma3"), (*_TRANSFORMERS_5, *_HEAD), "vllm models/llava.py, gemma3_mm.py"),
    Prefixes(("mistral3",), (*_TRANSFORMERS_5, *_HEAD, ("model.", "language_model.model.")), "vllm models/mistral3.py"),
    Prefixes(
        ("qwen2_vl", "qwen2_5_vl"),
        (
            ("model.language_model.", "language_model.model."),
            ("model.visual.", "visual."),
            *_HEAD,
            ("model.", "language_model.model."),
        ),
        "vllm models/qwen2_vl.py, qwen2_5_vl.py",
    ),
    Prefixes(
        QWEN3_VL,
        (("model.visual.", "visual."), *_HEAD, ("model.language_model.", "language_model.model.")),
        "vllm models/qwen3_vl.py, qwen3_5.py",
    ),
)

KV_CACHE = {
    "vllm": (("tensor", "attn_head"), "vllm compressed_tensors.py: CompressedTensorsKVCacheMethod"),
    "sglang": (("tensor",), "sglang compressed_tensors.py: CompressedTensorsKVCacheMethod"),
}
"""The strategies of float8 caches that engines read, and where it is said. transformers ignores such scales."""

PER_HEAD_SM = (9, 10)
"""Major compute capabilities on which vLLM has FlashAttention 3 or 4, the only backends with scales for each head."""
PER_HEAD = (
    "vllm v1/attention/backends/flash_attn.py: supports_per_head_quant_scales; fa_utils.py: get_flash_attn_version"
)

VLLM_CPU_CACHE = "vllm v1/attention/backends/cpu_attn.py: _get_attn_isa; run"
CPU_CACHE_HEAD = 32
"""Sizes of heads that its float8 cache takes on a CPU are multiples of it."""
CPU_CACHE_NOTES = (
    (("tensor", "attn_head"), "vLLM's CPU build cuts keys and values off toward zero where others round to nearest"),
    (("attn_head",), "vLLM's CPU build takes the largest scale of a layer for all its heads"),
)
"""Of which strategies, and what differs there from what the scales were made for."""
