"""Patching a model: finding its sites, planning, making its layers run fused, and taking all of it back."""
