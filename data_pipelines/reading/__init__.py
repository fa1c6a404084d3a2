"""Reading RLDS datasets as batches through tf.data."""
