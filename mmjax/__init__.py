"""mmjax: multimodal sentiment analysis when data is missing, in JAX."""
