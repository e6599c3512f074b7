"""Patching a model: finding its sites, planning, making its layers run fused, and undoing all of it."""
