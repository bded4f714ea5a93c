# Tokens to a trained model: weights to start from and the plan before anything is spent, then training.


rule adapt_weights:
    input:
        unpack(inputs_of("adapt_weights")),
    output:
        weights="results/starts/{experiment}/weights.safetensors",
        facts="results/starts/{experiment}/start.json",
    log:
        "logs/adapt_weights/{experiment}.log",
    benchmark:
        "logs/adapt_weights/{experiment}.tsv"
    priority: 1  # weights that do not fit end the run, before corpora are encoded
    conda:
        "../envs/snakegpt.yaml"
    threads: 1
    resources:
        mem_mb=8000,
        runtime=30,
    params:
        settings=settings_of("adapt_weights"),
        code=code_of_stage("adapt_weights"),
        arguments=arguments_of("adapt_weights"),
    shell:
        "python -m snakegpt.run {params.arguments:q} --threads {threads} --log {log:q}"


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
