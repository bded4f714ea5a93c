# Tokens to a trained model: the plan before anything is spent, then training.


rule plan_training:
    input:
        unpack(inputs_of("plan_training")),
    output:
        plan="results/plans/{experiment}/plan.json",
    log:
        "logs/plan_training/{experiment}.log",
    benchmark:
        "logs/plan_training/{experiment}.tsv"
    # Before the corpus is fetched and encoded, which may take hours: it may say that training cannot be.
    priority: 1
    conda:
        "../envs/snakegpt.yaml"
    threads: TRAINING_THREADS
    resources:
        mem_mb=8000,
        runtime=10,
        gpu=GPU,
    params:
        settings=settings_of("plan_training"),
        code=code_of_stage("plan_training"),
        arguments=arguments_of("plan_training"),
    shell:
        "python -m snakegpt.run {params.arguments:q} --threads {threads} --log {log:q}"


rule train_model:
    input:
        unpack(inputs_of("train_model")),
        unpack(before_training),
    output:
        weights="results/models/{experiment}/weights.safetensors",
        best="results/models/{experiment}/best.safetensors",
        config="results/models/{experiment}/config.json",
        metrics="results/models/{experiment}/metrics.jsonl",
        optimizer="results/models/{experiment}/optimizer.safetensors",
    log:
        "logs/train_model/{experiment}.log",
    benchmark:
        "logs/train_model/{experiment}.tsv"
    conda:
        "../envs/snakegpt.yaml"
    threads: TRAINING_THREADS
    resources:
        mem_mb=8000,
        runtime=1440,
        gpu=GPU,
        mpi=launcher_of_nodes,
        nodes=several_nodes,
        tasks=several_nodes,
    params:
        settings=settings_of("train_model"),
        code=code_of_stage("train_model"),
        arguments=arguments_of("train_model"),
    shell:
        "python -m snakegpt.run {params.arguments:q} --threads {threads} --state --log {log:q}"
