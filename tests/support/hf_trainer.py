"""A Trainer for the pictures of the examples, and a loss that remembers its calls. Needs transformers."""

from host_transformers import small_model
from safetensors.torch import load_file
from transformers import TrainingArguments

from protoclip_losses import ProtoLoss
from protoclip_losses.integrations.transformers import ProtoCLIPTrainer

HEADS = {"dim": 8, "hidden_dim": 16, "norm": "layer"}


def training_arguments(folder, **given):
    """Two epochs in batches of 11."""
    fixed = {"num_train_epochs": 2, "per_device_train_batch_size": 11, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 3}
    return TrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True, **{**fixed, **given})


def trainer(folder, pairs, cls=ProtoCLIPTrainer, arguments=(), model="small", **more):
    """A Trainer of the small CLIPModel, with small heads and four prototypes if it is ours."""
    if issubclass(cls, ProtoCLIPTrainer):
        more = {"heads": HEADS, "num_prototypes": 4, **more}
    model = small_model() if model == "small" else model
    return cls(model=model, args=training_arguments(folder, **dict(arguments)), train_dataset=pairs, **more)


def weights(folder):
    return load_file(folder / "model.safetensors")


class Recorded(ProtoLoss):
    """ProtoLoss that remembers the samples and the parts of each call."""

    def __init__(self, **options):
        super().__init__(**options)
        self.calls = []

    def forward(self, *args, index=None, **kwargs):
        parts = super().forward(*args, index=index, **{**kwargs, "output_dict": True})
        self.calls.append((index.tolist(), {name: float(x.detach()) for name, x in parts.items()}))
        return sum(parts.values())

    @property
    def samples(self):
        """Of all calls, in order."""
        return [i for index, _ in self.calls for i in index]
