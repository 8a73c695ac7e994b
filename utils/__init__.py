"""What all stages share: console, arguments, PPO's arithmetic, files."""
