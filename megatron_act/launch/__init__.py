"""One YAML to the commands of a cluster: ``python -m megatron_act.launch CONFIG.yaml --nodes N --platform slurm``.

Every platform runs the same script on every node (`node`), with the same torchrun line; they differ in how a node
learns its number and the first node's address, and in what they are told about queues, images and volumes (`slurm`,
`kubernetes`, `skypilot`; `local` starts the script itself).

Trust boundary: torchrun's rendezvous and the process groups authenticate nobody, and both unpickle what they receive.
Whoever reaches the rendezvous port, or the ports that the ranks open, can join the job, read and change what it
exchanges, and run code on its nodes. Keep them inside the cluster's private network; on Kubernetes a NetworkPolicy does
it. The scripts carry the config and all flags in clear text: secrets belong into the platform's own store, not under
``env``.
"""
