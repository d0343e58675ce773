#!/usr/bin/env bash
# A run on GKE as a JobSet: bash launch/jobset.sh | kubectl apply -f -
# After a preemption the JobSet starts all hosts again, and the run goes on from its checkpoint.
set -euo pipefail
source "$(dirname "$0")/env.sh"
cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: 50
  replicatedJobs:
    - name: slice
      replicas: $SLICES
      template:
        spec:
          parallelism: $HOSTS
          completions: $HOSTS
          backoffLimit: 0
          template:
            metadata:
              annotations:
                gke-gcsfuse/volumes: "true"
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 300
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $NODES
                cloud.google.com/gke-tpu-topology: $SHAPE
              containers:
                - name: unipic
                  image: $IMAGE
                  command: ["bash", "-c", "exec $COMMAND --distributed"]
                  env:
                    - {name: LIBTPU_INIT_ARGS, value: "$LIBTPU_INIT_ARGS"}
                    - {name: JAX_COMPILATION_CACHE_DIR, value: "$JAX_COMPILATION_CACHE_DIR"}
                    - {name: JAX_COORDINATOR_PORT, value: "$JAX_COORDINATOR_PORT"}
                  ports:
                    - containerPort: 8471
                    - containerPort: 8080
                    - containerPort: $JAX_COORDINATOR_PORT
                  resources:
                    limits:
                      google.com/tpu: $CHIPS_PER_HOST
                  volumeMounts:
                    - {name: data, mountPath: /data}
                    - {name: shared-memory, mountPath: /dev/shm}
              volumes:
                - name: data
                  csi:
                    driver: gcsfuse.csi.storage.gke.io
                    volumeAttributes:
                      bucketName: $BUCKET
                      mountOptions: implicit-dirs
                - name: shared-memory
                  emptyDir:
                    medium: Memory
YAML
