"""What serving engines ask of a checkpoint: one table, and what a checkpoint or a plan does not fulfil of it."""

from vlmquant.engines.rules import Contract, Finding, check_checkpoint, check_plan

__all__ = ["Contract", "Finding", "check_checkpoint", "check_plan"]
