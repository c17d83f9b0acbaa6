"""ADMIN (arXiv 2004.08249, arXiv 2008.07772): the residual block, Transformers made of it, where its ω starts, and a
trained model folded into torch's own layers. The public names are those of :mod:`repdeg_fast.nn`."""
