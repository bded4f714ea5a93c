# What this machine's network does for the ranks that training would use. Measures; changes no result.


rule bench_network:
    input:
        unpack(inputs_of("bench_network")),
    output:
        network="results/networks/{experiment}/network.json",
    log:
        "logs/bench_network/{experiment}.log",
    benchmark:
        "logs/bench_network/{experiment}.tsv"
    conda:
        "../envs/snakegpt.yaml"
    threads: TRAINING_THREADS
    resources:
        mem_mb=4000,
        runtime=20,
        gpu=GPU,
        mpi=launcher_of_nodes,
        nodes=several_nodes,
        tasks=several_nodes,
    params:
        settings=settings_of("bench_network"),
        code=code_of_stage("bench_network"),
        arguments=arguments_of("bench_network"),
    shell:
        "python -m snakegpt.run {params.arguments:q} --threads {threads} --log {log:q}"
