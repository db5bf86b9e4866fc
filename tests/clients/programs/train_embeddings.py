"""Trains sentence embeddings with sentence-transformers."""

from datasets import Dataset
from rows import rows
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.losses import MultipleNegativesRankingLoss

texts = {
    "anchor": [row.question for row in rows()],
    "positive": [row.chosen for row in rows()],
}
data = Dataset.from_dict(texts)
model = SentenceTransformer("../llama", device="cpu")
arguments = SentenceTransformerTrainingArguments(
    output_dir="out",
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    max_steps=5,
    learning_rate=1e-2,
    max_grad_norm=0.1,
    logging_steps=1,
    eval_strategy="steps",
    eval_steps=2,
    save_steps=5,
    use_cpu=True,
    disable_tqdm=True,
    report_to="none",
    seed=3,
)
trainer = SentenceTransformerTrainer(
    model=model,
    args=arguments,
    train_dataset=data.select(range(40)),
    eval_dataset=data.select(range(40, 48)),
    loss=MultipleNegativesRankingLoss(model),
)
trainer.train()
