"""What does it cost? Time and memory of the losses, of K-means, of a training step in each host, and of the CC3M recipe."""
