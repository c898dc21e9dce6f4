"""Repair of a distilled student: a LoRA that brings back what its noise meant."""
