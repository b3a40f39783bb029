"""The shared parts of small-gpt. Nothing here imports model.py or a script."""
