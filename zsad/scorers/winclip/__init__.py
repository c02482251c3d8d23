"""WinCLIP and WinCLIP+ (Jeong et al., CVPR 2023): windows of patches, texts and normal images."""
