"""What an iteration of PPO collects: replies, and the log-probs of the distribution that they were sampled from."""
