"""Text to translation: corpus, subwords, batches, model, trainer, checkpoints, evaluation, export."""
