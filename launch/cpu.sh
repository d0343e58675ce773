# What makes training on a CPU faster; to be sourced. A step makes hundreds of megabytes of
# temporaries: kept by the allocator, in its one arena that can keep them, they are not faulted in
# anew at every step.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000:glibc.malloc.top_pad=100000000}
