"""RED on PEFT's public scoreboard: training on MetaMathQA, answers to GSM8K, results in the scoreboard's form."""
