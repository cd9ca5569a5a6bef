"""Feature pickles -> checked arrays -> TFRecords (TensorFlow Datasets) with a dataset card."""
