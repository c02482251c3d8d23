"""Liver flows: prepare, train, segment, evaluate and report; ablation; sensitivity to inserted lesions."""
