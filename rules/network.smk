# What network and machine do for the ranks that training would use. Measures; changes no result.


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


rule measure_scaling:
    input:
        unpack(inputs_of("measure_scaling")),
        network="results/networks/{experiment}/network.json",
    output:
        scaling="results/scaling/{experiment}/scaling.json",
    log:
        "logs/measure_scaling/{experiment}.log",
    benchmark:
        "logs/measure_scaling/{experiment}.tsv"
    conda:
        "../envs/snakegpt.yaml"
    threads: TRAINING_THREADS
    resources:
        mem_mb=8000,
        runtime=30,
        gpu=GPU,
        mpi=launcher_of_nodes,
        nodes=several_nodes,
        tasks=several_nodes,
    params:
        settings=settings_of("measure_scaling"),
        code=code_of_stage("measure_scaling"),
        arguments=arguments_of("measure_scaling"),
    shell:
        "python -m snakegpt.run {params.arguments:q} --threads {threads} --log {log:q}"


rule draw_network:
    input:
        unpack(inputs_of("draw_network")),
    output:
        page=report(
            "results/networks/{experiment}/network.html",
            caption="../workflow/report/captions/network.rst",
            category="Networks",
            labels={"experiment": "{experiment}"},
        ),
    log:
        "logs/draw_network/{experiment}.log",
    benchmark:
        "logs/draw_network/{experiment}.tsv"
    localrule: True
    conda:
        "../envs/snakegpt.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
    params:
        settings=settings_of("draw_network"),
        code=code_of_stage("draw_network"),
        arguments=arguments_of("draw_network"),
    shell:
        "python -m snakegpt.run {params.arguments:q} --threads {threads} --log {log:q}"
