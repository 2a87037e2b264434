import torch
from torch.nn.functional import normalize

from protoclip_losses import EpisodicClusterer, FeatureBank
from protoclip_losses.plots import episode_report

torch.manual_seed(0)
groups, centers = torch.randint(40, (2000,)), torch.randn(40, 16)
clusterer = EpisodicClusterer(num_prototypes=60, warm_start=True)
for noise in (2.0, 1.4, 1.0, 0.8, 0.7):  # of the encoders, less in each episode
    features = {name: normalize(centers[groups] + noise * torch.randn(2000, 16)) for name in ("image", "text")}
    report = clusterer.build(FeatureBank.from_features(torch.arange(2000), **features)).report
episode_report(report, "episode_report.png")
