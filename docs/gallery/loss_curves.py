import torch
from torch.nn.functional import normalize

from protoclip_losses import OnlinePrototypes, ProtoLoss
from protoclip_losses.plots import loss_curves

torch.manual_seed(0)
pairs = torch.randn(10, 32).repeat(40, 1) + torch.randn(400, 32)  # ten groups
encoders = torch.nn.ModuleList([torch.nn.Linear(32, 8), torch.nn.Linear(32, 8)])
optimizer = torch.optim.AdamW(encoders.parameters(), lr=1e-2)
loss_fn, records = ProtoLoss(target_temperature=0.1), []
loss_fn.set_prototypes(OnlinePrototypes(num_prototypes=20, queue_size=400, every=20, warmup=60))
for step in range(300):
    rows = pairs[torch.randperm(400)[:20]]
    features = (normalize(encoder(rows + torch.randn(20, 32)), dim=1) for encoder in encoders)
    losses = loss_fn(*features, logit_scale=14.0, output_dict=True)
    loss = sum(losses.values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    records.append({"step": step, "loss": loss.item(), **{name: x.item() for name, x in losses.items()}})
loss_curves(records, "loss_curves.png")
