"""The fake kernels, one module per op: they check what the real ones do, but for values in tensors.

So meta tensors and graphs under construction are refused where real tensors would be, in the same
words. The real checks are those of csrc/bindings; here sizes may be symbols. Importing a module
registers its kernels.
"""
