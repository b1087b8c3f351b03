from lumos_kernels.masked_sample.api import masked_sample as masked_sample
