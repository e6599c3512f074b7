"""The job of `red-kernels finetune`: train edits on a base model, show what they bring, save them."""
