"""Quality of the methods of fine-tuning under equal budgets."""
