import torch

from protoclip_losses import KMeans
from protoclip_losses.plots import cluster_sizes

torch.manual_seed(0)
dense = torch.randn(2000, 1) ** 2 * torch.randn(2000, 8)  # many rows in the middle, few far out
cluster_sizes(KMeans(num_clusters=200).fit(dense).counts, "cluster_sizes.png")
