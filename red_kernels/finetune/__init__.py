"""The job of `red-kernels finetune`: train edits on a base model, evaluate them, save them."""
