"""What a user runs: one module a stage, each a typed function and a command."""
