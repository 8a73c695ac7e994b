"""What all stages share: console, arguments, data, chat template, PPO's arithmetic, files."""
