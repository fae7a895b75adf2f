"""Real servers on GPUs, tried as a user would: each module is a command that ends with a short table."""
