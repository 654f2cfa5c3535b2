{{/* Names, labels and pieces used more than once. */}}
{{- define "slmops.name" -}}
{{- if regexMatch "^[0-9]" .Release.Name }}slmops-{{ end }}{{/* a Service's name starts with a letter */ -}}
{{ .Release.Name | replace "." "-" | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "slmops.image" -}}
{{- $given := index .root.Values.images .name -}}
{{- if $given }}{{ $given }}{{ else }}docker.io/slmops/{{ .name }}:{{ .root.Chart.AppVersion }}{{ end -}}
{{- end }}

{{- define "slmops.labels" -}}
app.kubernetes.io/part-of: slmops
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "slmops.selector" . }}
{{- end }}

{{/* Of pods: nothing that another version of the chart changes, for that would start each of them anew. */}}
{{- define "slmops.podLabels" -}}
app.kubernetes.io/part-of: slmops
{{ include "slmops.selector" . }}
{{- end }}

{{- define "slmops.selector" -}}
app.kubernetes.io/name: slmops-{{ .part }}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
{{- end }}

{{- define "slmops.registryHost" -}}{{ include "slmops.name" . }}-registry.{{ .Release.Namespace }}.svc:5000{{- end }}

{{- define "slmops.store" -}}
{{- if .Values.store.url }}{{ .Values.store.url }}{{ else if .Values.registry.enabled }}oci://{{ include "slmops.registryHost" . }}{{ end -}}
{{- end }}

{{- define "slmops.plainHttp" -}}
{{- $hosts := .Values.store.plainHttp -}}
{{- if .Values.registry.enabled }}{{ $hosts = prepend $hosts (include "slmops.registryHost" .) }}{{ end -}}
{{- join "," $hosts -}}
{{- end }}

{{- define "slmops.prometheusUrl" -}}
{{- if .Values.prometheus.url }}{{ .Values.prometheus.url }}{{ else if .Values.prometheus.bundled.enabled }}http://{{ include "slmops.name" . }}-prometheus.{{ .Release.Namespace }}.svc:9090{{ end -}}
{{- end }}

{{- define "slmops.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "slmops.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "slmops.pullSecrets" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . | quote }}
{{- end }}
{{- end }}
{{- end }}

{{/* Where the chart's own pods may run. */}}
{{- define "slmops.placement" -}}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* What the operator may do in the namespaces it works in: no list of Secrets or ConfigMaps, no exec, no nodes. */}}
{{- define "slmops.rules" -}}
- apiGroups: [slmops.dev]
  resources: [distillationjobs, finetunejobs, quantizedmodels, modeldeployments]
  verbs: [get, list, watch]
- apiGroups: [slmops.dev]
  resources: [distillationjobs/status, finetunejobs/status, quantizedmodels/status, modeldeployments/status]
  verbs: [patch]
- apiGroups: [slmops.dev]  # owner references with blockOwnerDeletion
  resources: [distillationjobs/finalizers, finetunejobs/finalizers, quantizedmodels/finalizers, modeldeployments/finalizers]
  verbs: [update]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, create, patch, delete]
- apiGroups: [""]
  resources: [services]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [configmaps]  # read by name, written for routers
  verbs: [get, create, patch]
- apiGroups: [""]
  resources: [secrets]  # read by name, written for routers' tokens
  verbs: [get, create, patch]
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch]
- apiGroups: [""]
  resources: [events]
  verbs: [get, list, create, patch]
{{- end }}
