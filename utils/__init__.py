"""What all stages share: console, arguments, data, base model, adapters, heads, PPO's arithmetic, files."""
