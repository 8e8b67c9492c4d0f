"""Fine-tuning: a language model, and three ways to change what it answers: SFT with LoRA, GRPO, DAPO."""
