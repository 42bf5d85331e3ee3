"""The recipes of docs/how-to/frameworks.md, as they stand there, in the frameworks that are installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "frameworks.md"
BEGIN = "import torch\nfrom torch import nn\nimport evenkeel\n"
LIGHTNING = """
class Net(lightning.pytorch.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)
    def training_step(self, batch, number):
        return self.layer(batch[0]).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(48, 16)), batch_size=4)
compressed = Compressed()
options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer = lightning.pytorch.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, callbacks=[compressed], **options
)
trainer.fit(Net(), data)
state = compressed.state
"""
ACCELERATE_BEGIN = """
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
model = nn.Linear(16, 16)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
"""
ACCELERATE = """
for _ in range(6):
    optimizer.zero_grad()
    accelerator.backward(model(torch.randn(4, 16)).square().mean())
    optimizer.step()
"""
TRAINER = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 16)
    def forward(self, x=None, labels=None):
        return {"loss": self.layer(x).square().mean()}

compressed = Compressed()
arguments = transformers.TrainingArguments(
    "out", use_cpu=True, max_steps=6, per_device_train_batch_size=2, report_to=[], save_strategy="no"
)
data = [{"x": torch.randn(16), "labels": 0} for _ in range(32)]
trainer = transformers.Trainer(Net(), arguments, train_dataset=data, callbacks=[compressed])
compressed.trainer = trainer
trainer.train()
state = compressed.state
"""
END = "\nassert state.stats().compressed_steps == 4\nstate.close()\n"


def recipe(title: str) -> str:
    return PAGE.read_text(encoding="utf-8").split(f"## {title}\n")[1].split("```python\n")[1].split("```")[0]


@pytest.mark.parametrize(
    ("module", "before", "title", "after"),
    [
        ("lightning", "import lightning.pytorch\n", "Lightning", LIGHTNING),
        ("accelerate", ACCELERATE_BEGIN, "Accelerate", ACCELERATE),
        ("transformers", "import transformers\n", "Hugging Face Trainer", TRAINER),
    ],
)
def test_recipe(module: str, before: str, title: str, after: str, tmp_path: Path) -> None:
    pytest.importorskip(module)
    (tmp_path / "train.py").write_text(BEGIN + before + recipe(title) + after + END, encoding="utf-8")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train.py"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
