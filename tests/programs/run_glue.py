"""A stand-in for Hugging Face's examples/pytorch/text-classification/run_glue.py: it knows nothing of rso_ds."""

from dataclasses import dataclass

import numpy as np
from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)


@dataclass
class Arguments:
    model_name_or_path: str
    train_file: str
    validation_file: str
    test_file: str
    max_seq_length: int = 32


def main():
    args, training_args = HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(training_args.seed)
    files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    raw = load_dataset("csv", data_files=files)
    labels = sorted(set(raw["train"]["label"]))
    config = AutoConfig.from_pretrained(args.model_name_or_path, num_labels=len(labels))
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    model = AutoModelForSequenceClassification.from_pretrained(args.model_name_or_path, config=config)
    ids = {label: i for i, label in enumerate(labels)}

    def preprocess(rows):
        found = tokenizer(rows["sentence"], truncation=True, max_length=args.max_seq_length)
        found["labels"] = [ids.get(label, 0) for label in rows["label"]]
        return found

    with training_args.main_process_first(desc="dataset map pre-processing"):
        data = raw.map(preprocess, batched=True, remove_columns=["sentence", "label"])

    def compute_metrics(p: EvalPrediction):
        return {"accuracy": float((np.argmax(p.predictions, axis=1) == p.label_ids).mean())}

    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        compute_metrics=compute_metrics,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    if training_args.do_train:
        result = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
        trainer.save_model()
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
    if training_args.do_eval:
        trainer.save_metrics("eval", trainer.evaluate())
    if training_args.do_predict:
        predictions = np.argmax(trainer.predict(data["test"]).predictions, axis=1)
        if trainer.is_world_process_zero():
            with open(f"{training_args.output_dir}/predict_results.txt", "w") as f:
                f.write("".join(f"{labels[i]}\n" for i in predictions))


if __name__ == "__main__":
    main()
