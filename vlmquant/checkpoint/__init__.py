"""Checkpoint directories: written block by block so that a killed run resumes, put in place at once, checked again."""

from vlmquant.checkpoint.reader import read_manifest, verify_checkpoint
from vlmquant.checkpoint.writer import CheckpointWriter

__all__ = ["CheckpointWriter", "read_manifest", "verify_checkpoint"]
