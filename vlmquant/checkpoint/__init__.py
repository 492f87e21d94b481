"""Checkpoint directories: written block by block so that a killed run resumes, put in place at once, checked again."""

from vlmquant.checkpoint.coded import check_coded, open_coded
from vlmquant.checkpoint.inputs import Inputs
from vlmquant.checkpoint.manifest import read_manifest
from vlmquant.checkpoint.place import check_output
from vlmquant.checkpoint.reader import verify_checkpoint
from vlmquant.checkpoint.writer import AlreadyFinishedError, CheckpointWriter

__all__ = [
    "AlreadyFinishedError",
    "CheckpointWriter",
    "Inputs",
    "check_coded",
    "check_output",
    "open_coded",
    "read_manifest",
    "verify_checkpoint",
]
