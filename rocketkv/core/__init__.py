"""Stages, indexes and attention as pure functions on tensors; imports torch only."""
