"""Liver flows: prepare, train, segment, evaluate, report; ablation; inserted lesions."""
