"""Fits a small causal language model with Lightning; `python fit_lightning.py KIND [RUN]`."""

import sys

import torch
from rows import rows
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import ulysses_monitor as um

KIND, RUN = sys.argv[1], (sys.argv[2:] or [None])[0]
if KIND == "other namespace":
    import pytorch_lightning as L
    from pytorch_lightning.loggers import CSVLogger
    from pytorch_lightning.utilities import grad_norm
else:
    import lightning as L
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.utilities import grad_norm

SETTINGS = {
    "accumulation": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    "bf16": {"precision": "bf16-mixed", "gradient_clip_val": 0.1},
    "manual": {},
    "ddp": {"devices": 2, "strategy": "ddp", "gradient_clip_val": 0.1},
    "other namespace": {"gradient_clip_val": 0.1},
}


class Causal(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = KIND != "manual"
        self.model = AutoModelForCausalLM.from_pretrained("../llama")

    def training_step(self, batch, index):
        loss = self.model(**batch).loss
        self.log("train_loss", loss)
        self.log("train_certainty", loss.neg().exp())
        if KIND == "manual":
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.log_dict(grad_norm(self.model, 2))
            self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            optimizer.step()
        return loss

    def on_before_optimizer_step(self, optimizer):
        if KIND != "manual":
            self.log_dict(grad_norm(self.model, 2))

    def validation_step(self, batch, index):
        self.log("val_loss", self.model(**batch).loss, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def loader(part):
    tokenizer = AutoTokenizer.from_pretrained("../llama")

    def collate(texts):
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "labels": labels,
        }

    return DataLoader([" ".join(row) for row in part], batch_size=4, collate_fn=collate)


def main():
    L.seed_everything(0)
    callbacks = []
    if RUN:
        monitor = um.Monitor(RUN)
        callbacks.append(um.LightningCallback(monitor))
    trainer = L.Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        logger=CSVLogger(".", name="logs", version=0),
        log_every_n_steps=1,
        max_epochs=1,
        **{"devices": 1, **SETTINGS[KIND]},
    )
    module = Causal()
    trainer.fit(module, loader(rows()[:40]), loader(rows()[40:]))
    if trainer.is_global_zero:
        torch.save(module.state_dict(), "weights.pt")


if __name__ == "__main__":
    main()
