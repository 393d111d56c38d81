"""The paper's two models: their sizes (`config`), what stands around attention (`layers`), the
residual `blocks`, and the models themselves (`transformer`). Knows nothing of
decoding or training."""
