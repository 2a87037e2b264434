import torch

from protoclip_losses import KMeans
from protoclip_losses.plots import cluster_grid

torch.manual_seed(0)
colours = torch.rand(300, 3)
ramp = torch.linspace(0.4, 1, 16).view(1, 1, 16, 1)  # darker at the top
pictures = (255 * colours[:, :, None, None] * ramp).expand(300, 3, 16, 16).to(torch.uint8)
captions = [f"red {r:.1f} green {g:.1f} blue {b:.1f}" for r, g, b in colours.tolist()]
labels = KMeans(num_clusters=12).fit(colours).labels
cluster_grid(pictures, labels, captions, "cluster_grid.png", num_clusters=5)
