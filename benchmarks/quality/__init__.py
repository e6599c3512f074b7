"""Quality of the fine-tuning methods under equal budgets."""
