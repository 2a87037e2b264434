import torch

from protoclip_losses.plots import modality_map

torch.manual_seed(0)
categories = torch.arange(4).repeat(60)
concepts = 1.5 * torch.randn(4, 16)[categories]
image = concepts + torch.randn(240, 16)
text = concepts + torch.randn(240, 16) + 3 * torch.randn(16)  # one offset for all texts: the modality gap
modality_map(image, text, categories, ["animals", "food", "flags", "tools"], "modality_map.png")
