"""The vision encoders as data: names, published weights, sizes and key tables, a file per family."""
