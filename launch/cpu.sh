# What makes training on a CPU faster; to be sourced. A step makes hundreds of megabytes of
# temporaries: kept by the allocator, in its one arena that can keep them, they are not faulted in
# anew at every step.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000:glibc.malloc.top_pad=100000000}
# A device for each core that this shell may use, as a power of two up to eight: batches divide by it.
devices=1
while [ $((2 * devices)) -le "$(nproc)" ] && [ "$devices" -lt 8 ]; do devices=$((2 * devices)); done
export JAX_NUM_CPU_DEVICES=${JAX_NUM_CPU_DEVICES:-$devices}
