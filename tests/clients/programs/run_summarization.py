"""Fine-tunes a small T5 as transformers' example script does, with generation in evaluation."""

import sys
from dataclasses import dataclass, field

import numpy as np
import transformers
from datasets import Dataset
from rows import rows
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)


@dataclass
class DataArguments:
    max_source_length: int = field(default=48)
    max_target_length: int = field(default=16)


def build_model(tokenizer):
    transformers.set_seed(1)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return T5ForConditionalGeneration(config)


def main():
    parser = HfArgumentParser((DataArguments, Seq2SeqTrainingArguments))
    data_arguments, arguments = parser.parse_args_into_dataclasses(sys.argv[1:])
    transformers.set_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained("../llama")
    model = build_model(tokenizer)

    def tokenize(examples):
        inputs = tokenizer(
            examples["text"], max_length=data_arguments.max_source_length, truncation=True
        )
        targets = tokenizer(
            text_target=examples["summary"],
            max_length=data_arguments.max_target_length,
            truncation=True,
        )
        return {**inputs, "labels": targets["input_ids"]}

    data = Dataset.from_dict(
        {"text": [row.question for row in rows()], "summary": [row.chosen for row in rows()]}
    ).map(tokenize, batched=True, remove_columns=["text", "summary"])

    def compute_metrics(predicted):
        ids = np.where(predicted.predictions < 0, tokenizer.pad_token_id, predicted.predictions)
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        return {"gen_len": float(np.mean([len(text) for text in texts]))}

    trainer = Seq2SeqTrainer(
        model=model,
        args=arguments,
        train_dataset=data.select(range(40)),
        eval_dataset=data.select(range(40, 48)),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        compute_metrics=compute_metrics,
    )
    result = trainer.train()
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_state()
    metrics = trainer.evaluate(max_length=data_arguments.max_target_length)
    trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    main()
