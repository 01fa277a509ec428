"""What the other upsamplers are without a framework: settings, key tables, published weights, and reading these."""
